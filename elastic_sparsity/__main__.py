"""`python -m elastic_sparsity`."""

from elastic_sparsity.cli import main

main()
