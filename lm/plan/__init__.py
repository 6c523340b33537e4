"""What an experiment costs: arithmetic of a model, and what chips can do."""
