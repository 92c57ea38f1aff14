"""What one does after training: load, export, render, play and plot runs."""
