"""What the command line runs: modules with `make_parser()` and `main(...)`, also scripts for `accelerate launch`."""
