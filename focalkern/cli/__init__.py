"""The command `focalkern`: train, plan, check, env. `main` dispatches, `job` reads a recipe."""
