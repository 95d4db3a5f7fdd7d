from experiments.progress import show_what_can_be_shown

show_what_can_be_shown()
