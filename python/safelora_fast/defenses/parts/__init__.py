"""Implementation of the defenses. These files import torch at the top; the files of the defenses import it lazily."""
