"""The Viterbi search of the codec's trellis, on a GPU."""
