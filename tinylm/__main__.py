"""`python -m tinylm` is the `tinylm` command."""

from tinylm.cli import main

main()
