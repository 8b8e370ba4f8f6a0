"""The probe `passk`: how often models solve problems within k tries."""
