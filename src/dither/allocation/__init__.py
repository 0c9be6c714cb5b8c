"""Which bits where: score tables, and what chooses a format for each unit within budgets. No model in sight."""
