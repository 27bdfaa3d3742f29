"""What a machine with a GPU is asked, in steps of under nine minutes: `make gpu`."""
