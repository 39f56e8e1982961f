"""The commands of the command line, a module each: ``command`` in it is what `minitrain.cli` runs."""
