"""One experiment a file: `def experiment() -> Experiment`, chosen by --experiment=NAME."""
