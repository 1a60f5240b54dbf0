"""What leaves a run: its record, its model card, its publication and its exports."""
