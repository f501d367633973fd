"""Plan a run without hardware: parameters, memory, time, communication, and errors in its layout."""
