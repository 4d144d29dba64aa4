"""Entry point of `python -m benchmarks`. Both sides use huge pages, as the trainer does."""

from train.huge_pages import restart_in_huge_pages

if __name__ == "__main__":
    restart_in_huge_pages()
    from benchmarks.cli import main

    raise SystemExit(main())
