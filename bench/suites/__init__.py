"""One module or package per suite, each with `run_suite(quick, only)`, which yields rows."""
