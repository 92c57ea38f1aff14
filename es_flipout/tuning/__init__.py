"""Search for the options of a task with Optuna: ``es-flipout tune``."""
