/* The guest agent alone, for a device: one row a second to a file, a pipe or a port. */
#include "guest.h"
int main(int n, char **words) { play_agent(n > 1 ? words[1] : "/dev/stdout"); }
