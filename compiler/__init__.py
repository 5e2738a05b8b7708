"""How a traced graph becomes a running one, and what happened to it."""
