"""mbx's functional core: no files, no command line, no model library."""
