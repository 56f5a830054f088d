"""What is known to go wrong in a model: structure that int8 suffers from, sums that clip in 16 bits."""
