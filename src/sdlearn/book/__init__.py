"""What the chapters draw with: figures, and figures that move. It imports no model."""
