"""What correctness means here: the comparison rule, sample inputs, and checks without a GPU."""
