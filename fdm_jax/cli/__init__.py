"""The program ``fdm``: one short module per command, each with HELP, add_arguments(parser) and run(args)."""
