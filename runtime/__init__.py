"""How a user trains: trainers, data, checkpoints, the command line."""

import logging

# At import bitsandbytes says that it could not fetch a CPU kernel from the hub, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
