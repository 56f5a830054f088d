"""What a float model is: its operators, layers and costs, and how it is read from a file and made into bytes."""
