"""What a run is asked to do: keys, their values, and Megatron-LM's command line in their place."""
