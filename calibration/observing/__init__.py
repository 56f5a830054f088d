"""What the float graph computes on samples, shown to observers, and whether more samples would change anything."""
