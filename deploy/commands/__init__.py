"""The subcommands of `headwise`, one file each."""
