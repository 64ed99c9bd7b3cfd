"""Planning past one machine: where experts should live, and what a layer would cost on how many ranks."""
