"""The command line: it parses options, calls the package and prints. Each group of commands has its own file."""
