// Package chaos kills the built acproxy at every call that changes its files, makes each of them fail, those that read too, and the disk full or read-only, and looks
// whether anything is lost or served wrong.
package chaos
