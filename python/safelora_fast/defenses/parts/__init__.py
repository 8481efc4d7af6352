"""What defenses are made of: code that needs torch when it is imported, so that the files of the defenses do not."""
