"""One module per suite, each with `run(quick) -> rows`."""
