"""`trl-ext compare`: arms that differ in what is compared alone, on paired seeds, with what they cost."""
