"""Several nodes over ssh: protocol, agent, phases, file transfer, drift."""
