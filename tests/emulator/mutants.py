"""Planted defects: by program that runs the kernel, lists of (name, file under kernels/,
text, what becomes of it)."""

from mutants_attention import SM80_MUTANTS, SM90_MUTANTS
from mutants_lines import LINE_MUTANTS
from mutants_model import MODEL_MUTANTS
from mutants_selection import SELECTION_MUTANTS

PROGRAMS = {
    "mutant_sm80.cc": SM80_MUTANTS,
    "mutant_sm90.cc": SM90_MUTANTS,
    "mutant_selection.cc": SELECTION_MUTANTS,
    "mutant_lines.cc": LINE_MUTANTS,
    "mutant_model.cc": MODEL_MUTANTS,
}
