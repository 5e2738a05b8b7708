"""How a user trains: trainers, data, checkpoints, the command line."""
