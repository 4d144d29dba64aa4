"""`python -m benchmarks`: both sides in huge pages, as the trainer is."""

from train.huge_pages import restart_in_huge_pages

if __name__ == "__main__":
    restart_in_huge_pages()
    from benchmarks.cli import main

    raise SystemExit(main())
