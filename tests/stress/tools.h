/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What all parts of the stress program use, without the shim's interface: see tools.c. */
#ifndef TOOLS_H
#define TOOLS_H

/* Something that must never happen. It is printed, and the program fails. */
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

unsigned chance(unsigned n); /* 0 ... n-1 */
void nap(unsigned microseconds);
void compute(unsigned microseconds);
void seconds(double s);

#endif
