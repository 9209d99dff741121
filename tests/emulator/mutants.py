"""Planted defects: by programs that run the kernel, lists of (name, file under kernels/,
text, what becomes of it). A later program runs where the ones before it notice nothing."""

from mutants_attention import SM80_MUTANTS, SM90_MUTANTS
from mutants_correction import CORRECTION_MUTANTS
from mutants_lines import BLOCK_LINE_MUTANTS, KEY_LINE_MUTANTS
from mutants_model import MODEL_MUTANTS
from mutants_selection import SELECTION_MUTANTS

WIDE_HEADS = "mutant_wide_heads.cc"
PROGRAMS = {
    ("mutant_sm80.cc",): SM80_MUTANTS,
    ("mutant_sm90.cc",): SM90_MUTANTS,
    ("mutant_selection.cc", WIDE_HEADS): SELECTION_MUTANTS,
    ("mutant_correction.cc", WIDE_HEADS): CORRECTION_MUTANTS,
    ("mutant_block_lines.cc",): BLOCK_LINE_MUTANTS,
    ("mutant_key_lines.cc",): KEY_LINE_MUTANTS,
    ("mutant_model.cc",): MODEL_MUTANTS,
}
