/* Part of the include shim: bcc asks for this header, our programs need nothing from it. See README.md beside it. */
#include <linux/types.h>
