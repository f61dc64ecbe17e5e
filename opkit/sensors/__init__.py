"""WHAT THE MACHINE TELLS: clocks, heat, power and energy. Reads; sets nothing, judges nothing."""
