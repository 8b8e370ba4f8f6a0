"""The probe `reachability`: how often base models solve prompts, and which training each prompt is ready for."""
