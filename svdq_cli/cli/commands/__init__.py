"""One file for each command: parse, call one library function, render its report. Heavy imports are inside."""
