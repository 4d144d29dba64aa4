"""`python -m train`."""

from train.huge_pages import restart_in_huge_pages

if __name__ == "__main__":
    restart_in_huge_pages()
    from train.cli import main

    raise SystemExit(main())
