"""Operations of Liger-Kernel with the contracts of ours; explicit choices alone."""
