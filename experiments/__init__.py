"""What we ask: suites of runs, the training loop, and the commands around them. Nothing imports this package."""
