"""Bundle in, images out: prompts, noise, schedules, samplers, the pipeline; numpy, no torch."""
