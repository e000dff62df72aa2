// Command acomm calls acomm tasks, serves them with programs, and connects
// both over HTTP. Its help says how: acomm --help, acomm help call.
package main

import "os"

func main() {
	os.Exit(run())
}
