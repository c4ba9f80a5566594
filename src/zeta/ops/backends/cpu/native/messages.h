// What an entry point answers; Python makes the sentences (library.py).
#pragma once

enum ZetaAnswer {
    ZETA_DONE = 0,
    ZETA_OTHER_VERSION = 1,   // the struct's size is not this library's
    ZETA_NO_PROCESSOR = 2,    // the processor, or the build, lacks the instruction set
    ZETA_NO_MEMORY = 3,       // there was none left for scratch
    ZETA_NOT_PLAIN = 4,       // a direct call has to be checked and described after all
};
