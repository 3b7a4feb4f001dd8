"""Which steps, on which node, in what order; and the journal that takes them back."""
