"""What sampling is made of: the engine and method roles, noise, solvers, the handoff."""
